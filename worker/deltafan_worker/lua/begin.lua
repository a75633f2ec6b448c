-- Opens an attempt, or says why not.
-- ARGV  1 run           nonce of this attempt; a repeat with the same one gets the same answer
--       2 prev          run that this one replaces in place (restart, replay); '' for a claim
--       3 claim         number of the claim; grows with every claim of the job
--       4 min_attempt   highest attempt that the caller knows of
--       5 mode          claim | restart | replay (replay: same model call, written again)
--       6 max_runs      model runs allowed
--       7 live_ms       lifetime of a job that has not ended
--       8 info          JSON members of `started`, without braces
--       9 call, 10 note     the coming model call ('' for none) and the usage record that stands if we
--                           vanish, as JSON members
--      11 prev_call, 12 prev_note   usage of the call that this attempt follows in place; '' for none
--      13 stream_ttl_ms, 14 result_ttl_ms, 15 state_ttl_ms
--      16 on_interrupt  restart | continue | fail
--      17 from          the last entry that the caller has read and goes on from; '' to begin anew
-- Returns {'RUN', attempt, attempt_no, mode} | {'ENDED', status, notes} | {'STALE'} a newer claim owns the job |
-- {'MOVED'} `from` is not the last entry, or a hole lies before it: read again, or begin anew
local run, prev, claim, min_attempt, mode = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local ttls = { ARGV[13], ARGV[14], ARGV[15] }
local state = redis.call('HMGET', STATE, 'status', 'run', 'attempt', 'claim', 'runs', 'mode', 'cancel', 'base')
local status = ended(state[1])
if status then
  keep_ended(ttls)
  return { 'ENDED', status, notes() }
end
local owner, attempt, owner_claim, runs = state[2] or '', tonumber(state[3] or 0), tonumber(state[4] or -1), tonumber(state[5] or 0)
if owner == run then return { 'RUN', digits(attempt), runs, state[6] } end

local newer = claim > owner_claim
if mode == 'claim' then
  if not newer and (claim < owner_claim or owner ~= '') then return { 'STALE' } end
elseif owner ~= prev and not newer and (claim < owner_claim or owner ~= '' and min_attempt <= attempt) then
  return { 'STALE' }
end

local known = math.max(attempt, min_attempt)
local top_attempt, top_seq = top()
if ARGV[11] ~= '' then redis.call('HSET', STATE, 'u:' .. ARGV[11], ARGV[12]) end
if mode ~= 'replay' then
  if state[7] then
    close_cancelled(state[7], known, ttls)
    return { 'ENDED', 'cancelled', notes() }
  end
  if runs >= tonumber(ARGV[6]) then
    close_failed('too_many_attempts', 'the job was run ' .. runs .. ' times and ended in none of them', known, ttls)
    return { 'ENDED', 'failed', notes() }
  end
  if ARGV[16] == 'fail' and top_seq > 0 then
    close_failed('interrupted', 'the generation was cut after it had begun, and the request forbids a restart', known, ttls)
    return { 'ENDED', 'failed', notes() }
  end
end
local from = ARGV[17]
if from ~= '' and (digits(top_attempt) .. '-' .. digits(top_seq) ~= from or top_attempt ~= attempt
    or redis.call('XLEN', EVENTS) ~= tonumber(state[8] or -1) + top_seq) then
  return { 'MOVED' }
end

local how = mode == 'replay' and 'replay' or (from ~= '' and 'continue') or (top_attempt == 0 and 'fresh' or 'restart')
local number = digits(next_attempt(known))
if mode ~= 'replay' or runs == 0 then runs = runs + 1 end -- 0: a replay after the state was lost
redis.call('XADD', EVENTS, number .. '-0', 'type', 'started', 'data', '{"attempt":' .. number .. ',"attempt_no":' .. runs ..
  ',"run":"' .. run .. '","mode":"' .. how .. '",' .. (from ~= '' and '"from":"' .. from .. '",' or '') .. ARGV[8] .. '}')
local base = redis.call('XLEN', EVENTS)
redis.call('HSET', STATE, 'status', 'running', 'attempt', number, 'run', run, 'claim', digits(math.max(claim, owner_claim)),
  'runs', runs, 'base', base, 'mode', how)
local response = redis.call('HGET', STATE, 'response')
if response and string.sub(response, 1, #ARGV[9] + 1) ~= ARGV[9] .. ' ' then redis.call('HDEL', STATE, 'response') end
if ARGV[9] ~= '' then
  redis.call('HSETNX', STATE, 'u:' .. ARGV[9], '{"attempt":' .. number .. ',"attempt_no":' .. runs .. ',' .. ARGV[10] .. '}')
end
keep(ARGV[7])
redis.call('PUBLISH', BELL, '')
return { 'RUN', number, runs, how }
