-- Gives a running job back to the queue's next claimant without spending one of its runs.
-- ARGV  run, call, note, live_ms        Returns {'OK' | 'CHECK', notes}
if redis.call('HGET', STATE, 'run') ~= ARGV[1] or ended(redis.call('HGET', STATE, 'status')) then return { 'CHECK', notes() } end
redis.call('HSET', STATE, 'run', '', 'status', 'queued')
if ARGV[2] ~= '' then redis.call('HSET', STATE, 'u:' .. ARGV[2], ARGV[3]) end
redis.call('HINCRBY', STATE, 'runs', -1)
keep(ARGV[4])
return { 'OK', notes() }
