-- Requests the end of a job.
-- ARGV  reason, live_ms, stream_ttl_ms, result_ttl_ms, state_ttl_ms [, '1' when arq has a record of it
--       [, '1' to leave alone what has ever been begun]]
-- Returns {'UNKNOWN'} (nothing written) | {'ENDED', status} | {'LEFT'} alone | {'CANCELLED'} it was waiting and has
-- ended now | {'REQUESTED'} its worker will end it.  The last two promise that the job will not end `completed`.
local state = redis.call('HMGET', STATE, 'status', 'attempt')
local status = ended(state[1])
if status then
  touch()
  return { 'ENDED', status }
end
if not state[1] and ARGV[6] ~= '1' then return { 'UNKNOWN' } end
if ARGV[7] == '1' and tonumber(state[2] or 0) > 0 then
  touch()
  return { 'LEFT' }
end
if not state[1] or state[1] == 'queued' then
  close_cancelled(ARGV[1], tonumber(state[2] or 0), { ARGV[3], ARGV[4], ARGV[5] })
  return { 'CANCELLED' }
end
redis.call('HSETNX', STATE, 'cancel', ARGV[1])
redis.call('PEXPIRE', STATE, ARGV[2])
return { 'REQUESTED' }
