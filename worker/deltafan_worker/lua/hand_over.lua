-- Gives a running job back to the queue's next claimant without spending one of its runs.
-- ARGV  run, call, note ('' to forget the call), live_ms, '1' to keep a job whose end was asked for
-- Returns 1, or 0 when it was not given back: it is not ours, has ended, or is to be ended
if redis.call('HGET', STATE, 'gave') == ARGV[1] then return 1 end -- a repeat, whose first answer was lost
if redis.call('HGET', STATE, 'run') ~= ARGV[1] or ended(redis.call('HGET', STATE, 'status')) then return 0 end
if ARGV[5] == '1' and redis.call('HEXISTS', STATE, 'cancel') == 1 then return 0 end
redis.call('HSET', STATE, 'run', '', 'status', 'queued', 'gave', ARGV[1])
if ARGV[3] ~= '' then
  redis.call('HSET', STATE, 'u:' .. ARGV[2], ARGV[3])
elseif ARGV[2] ~= '' then
  redis.call('HDEL', STATE, 'u:' .. ARGV[2])
end
redis.call('HINCRBY', STATE, 'runs', -1)
keep(ARGV[4])
return 1
