-- Notes a field in the state of a running attempt: where its response upstream is, for whoever goes on with it; or the
-- record of a model call that is repeated.
-- ARGV  run, field, value        Returns 1, or 0 when the attempt is no longer the job's
if redis.call('HGET', STATE, 'run') ~= ARGV[1] then return 0 end
redis.call('HSET', STATE, ARGV[2], ARGV[3])
return 1
