-- Says that a worker process lives, by the server's clock: those of hosts differ.  KEYS  worker, workers
-- ARGV  name, load, lifetime_ms: so long it counts as alive unless it shows itself again
local time = redis.call('TIME')
local now_s = time[1] + time[2] / 1e6
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[2], string.format('%.3f', now_s), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.3f', now_s - ARGV[3] / 1000))
redis.call('PEXPIRE', KEYS[2], ARGV[3])
