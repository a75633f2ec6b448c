-- Leaves word for a batch's runner, and for the workers that meet its jobs, unless it has ended.  KEYS  batch
-- Returns {status, ms since the runner was heard of}, or nil when nothing is known of it.
local found = redis.call('HMGET', KEYS[1], 'status', 'heard_s')
if not found[1] then return nil end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
if found[1] == 'running' or found[1] == 'interrupted' then
  redis.call('HSET', KEYS[1], 'cancel', string.format('%.0f', now_ms))
end
return { found[1], math.max(0, math.floor(now_ms - (found[2] or 0) * 1000)) }
