-- A job that was claimed waits for room, so it is queued, whatever a dead worker's run has left: a cancel ends it at once.
-- Only before the claim has begun an attempt; it may be repeated.
-- ARGV  claim, live_ms, stream_ttl_ms, result_ttl_ms, state_ttl_ms
-- Returns {'OK'} | {'ENDED', status, notes} it has ended, or was to be ended | {'STALE'} a newer claim owns the job
local ttls = { ARGV[3], ARGV[4], ARGV[5] }
local state = redis.call('HMGET', STATE, 'status', 'claim', 'cancel', 'attempt')
local status = ended(state[1])
if status then
  keep_ended(ttls)
  return { 'ENDED', status, notes() }
end
if tonumber(ARGV[1]) < tonumber(state[2] or -1) then return { 'STALE' } end
if state[3] then
  close_cancelled(state[3], tonumber(state[4] or 0), ttls)
  return { 'ENDED', 'cancelled', notes() }
end
if state[1] then
  redis.call('HSET', STATE, 'status', 'queued', 'run', '', 'claim', ARGV[1])
  keep(ARGV[2])
end
return { 'OK' }
