-- Gives a claim back: the job is due again after delay_ms.
-- KEYS  queue, doorbell      ARGV  token, id, delay_ms        Returns 1, or 0 when the lease is another's
local in_progress = 'arq:in-progress:' .. ARGV[2]
if redis.call('GET', in_progress) ~= ARGV[1] then return 0 end
local time = redis.call('TIME')
redis.call('DEL', in_progress)
redis.call('ZADD', KEYS[1], 'XX', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[3], ARGV[2])
redis.call('LPUSH', KEYS[2], 1)
redis.call('LTRIM', KEYS[2], 0, 63)
redis.call('PEXPIRE', KEYS[2], 60000)
return 1
