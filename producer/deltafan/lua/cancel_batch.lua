-- Leaves word for a batch's runner, if the batch is running.  KEYS  batch
-- Returns {status, heard_s}, or nil when nothing is known of it.
local found = redis.call('HMGET', KEYS[1], 'status', 'heard_s')
if not found[1] then return nil end
if found[1] == 'running' then redis.call('HSET', KEYS[1], 'cancel', 1) end
return { found[1], found[2] or '0' }
