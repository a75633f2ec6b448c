-- Ends a job that nobody runs and nobody will, under a new attempt.
-- ARGV  code, message, retryable ('1' | '0'), status it must still have, expiry_ms its state must still have ('' any),
--       stream_ttl_ms, result_ttl_ms, state_ttl_ms
-- Returns 1, or 0 when somebody has touched it meanwhile
local state = redis.call('HMGET', STATE, 'status', 'attempt', 'cancel')
if ended(state[1]) or state[1] ~= ARGV[4] then return 0 end
-- Two clocks of one server may be read a moment apart; a heartbeat moves the expiry by far more.
local expiry = now_ms() + redis.call('PTTL', STATE)
if ARGV[5] ~= '' and math.abs(expiry - tonumber(ARGV[5])) > 100 then return 0 end
local ttls, attempt = { ARGV[6], ARGV[7], ARGV[8] }, tonumber(state[2] or 0)
if state[3] then
  close_cancelled(state[3], attempt, ttls)
else
  local failure = { code = ARGV[1], message = ARGV[2], retryable = ARGV[3] == '1' }
  close('failed', failure, { failure = failure }, attempt, ttls)
end
return 1
