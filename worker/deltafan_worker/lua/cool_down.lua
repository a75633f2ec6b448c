-- A provider's model is left alone by all workers, for as long as the longest of its refusals has asked for.
-- KEYS  cool-down        ARGV  1 for how long (ms)
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], 1, 'PX', ARGV[1]) end
return 1
