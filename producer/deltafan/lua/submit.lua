-- Makes a job known, once.  KEYS  events, state, result [, arq job, in-progress, result, queue, doorbell]
-- ARGV  digest, live_ms, deadline_ms ('' for none), ticket ('' or one of this submit's own: see withdraw),
--       max_queued ('' for no limit) [, id, record, ttl_ms, ring, fair, tenant]
-- Returns {'NEW' | 'EXISTS' | 'CONFLICT', status}, or {'FULL', how many wait}: nothing is written.  With the queue's
-- keys it enqueues as well, also when the job is known but has not ended: a submit that died between its two writes is
-- mended by the next.
-- Most jobs are new: one question, to all that could know them, takes the place of three.
local is_new = redis.call('EXISTS', unpack(KEYS, 1, math.min(#KEYS, 6))) == 0

-- The status of a job that is known, and the digest of its request.
local function known()
  local state = redis.call('HMGET', STATE, 'status', 'digest')
  if state[1] or redis.call('EXISTS', EVENTS, RESULT) > 0 then return ended(state[1]) or state[1], state[2] end
end

local function submit()
  local status, digest
  if not is_new then status, digest = known() end
  if status then
    if digest and digest ~= ARGV[1] then return { 'CONFLICT', status } end
    redis.call('HDEL', STATE, 'ticket')
    touch()
    return { 'EXISTS', status }
  end
  if #KEYS > 3 and ARGV[5] ~= '' and (is_new or redis.call('EXISTS', KEYS[4], KEYS[5]) == 0) then
    local count = waiting(KEYS[7])
    if count >= tonumber(ARGV[5]) then
      redis.call('DEL', REQUEST)
      return { 'FULL', count }
    end
  end
  redis.call('HSET', STATE, 'status', 'queued', 'digest', ARGV[1], 'attempt', 0, 'claim', -1, 'runs', 0)
  if ARGV[3] ~= '' then redis.call('HSET', STATE, 'deadline', ARGV[3]) end
  if ARGV[4] ~= '' then redis.call('HSET', STATE, 'ticket', ARGV[4]) end
  redis.call('PEXPIRE', STATE, ARGV[2])
  return { 'NEW', 'queued' }
end

local answer = submit()
local open = answer[1] == 'NEW' or (answer[1] == 'EXISTS' and not TERMINAL[answer[2]] and answer[2] ~= 'expired')
if #KEYS > 3 and open and (is_new or not is_queued(KEYS[4], KEYS[5], KEYS[6])) then
  enqueue(KEYS[4], KEYS[7], KEYS[8], ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10] == '1' and ARGV[11])
end
return answer
