-- Keeps what a batch's runner says.  KEYS  batch, batches
-- ARGV  id, lifetime_ms, '1' for a run's first report, which forgets what was asked of earlier ones, field, value, …
-- Returns 1 when the batch's end was asked for
local time = redis.call('TIME')
local now_s = time[1] + time[2] / 1e6
if ARGV[3] == '1' then redis.call('HDEL', KEYS[1], 'cancel') end
redis.call('HSET', KEYS[1], 'heard_s', string.format('%.3f', now_s), unpack(ARGV, 4))
redis.call('ZADD', KEYS[2], string.format('%.3f', now_s), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.3f', now_s - ARGV[2] / 1000))
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[2]) end
return redis.call('HEXISTS', KEYS[1], 'cancel')
