-- Ends the job with the attempt's terminal entry, exactly once.
-- ARGV  1 run, 2 attempt, 3 seq of the terminal entry, 4 type, 5 data, 6 result, 7 call ('' for none), 8 note,
--       9 stream_ttl_ms, 10 result_ttl_ms, 11 state_ttl_ms
-- Returns {'OK' | 'ALREADY', status, notes} ended by us | {'ENDED', status, notes} by somebody else |
--         {'CANCEL', reason} cancelled first: finish as cancelled | {'CHECK'} compare, then finish again
local seq = tonumber(ARGV[3])
local ttls = { ARGV[9], ARGV[10], ARGV[11] }
local state = redis.call('HMGET', STATE, 'status', 'run', 'base', 'cancel')
local status = ended(state[1])
if status then
  keep_ended(ttls)
  return { state[2] == ARGV[1] and 'ALREADY' or 'ENDED', status, notes() }
end
if state[2] ~= ARGV[1] then return { 'CHECK' } end
if state[4] and ARGV[4] ~= 'cancelled' then return { 'CANCEL', state[4] } end
local top_attempt, top_seq = top()
if top_attempt ~= tonumber(ARGV[2]) or top_seq ~= seq - 1 or redis.call('XLEN', EVENTS) ~= tonumber(state[3]) + top_seq then
  return { 'CHECK' }
end
redis.call('XADD', EVENTS, 'NOMKSTREAM', ARGV[2] .. '-' .. ARGV[3], 'type', ARGV[4], 'data', ARGV[5])
redis.call('HSET', STATE, 'status', ARGV[4], 'ended', digits(now_ms()))
if ARGV[7] ~= '' then redis.call('HSET', STATE, 'u:' .. ARGV[7], ARGV[8]) end
redis.call('SET', RESULT, ARGV[6])
keep_ended(ttls)
redis.call('PUBLISH', BELL, ARGV[4])
return { 'OK', ARGV[4], notes() }
