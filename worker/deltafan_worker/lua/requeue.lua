-- Puts a job whose record alone is left back into its queue.
-- KEYS  queue, arq job, in-progress, doorbell      ARGV  id      Returns 1, or 0 when it is not so any more
if redis.call('EXISTS', KEYS[2]) == 0 or redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[1], 'NX', time[1] * 1000 + math.floor(time[2] / 1000), ARGV[1])
redis.call('LPUSH', KEYS[4], 1)
redis.call('LTRIM', KEYS[4], 0, 63)
redis.call('PEXPIRE', KEYS[4], 60000)
return 1
