-- Notes the upstream response that the running attempt reads, for whoever goes on with it.
-- ARGV  run, '<call> <provider> <response id>'        Returns 1, or 0 when the attempt is no longer the job's
if redis.call('HGET', STATE, 'run') ~= ARGV[1] then return 0 end
redis.call('HSET', STATE, 'response', ARGV[2])
return 1
