-- Names the job that answers this one's tool calls, once: whoever asks again gets the same id.
-- ARGV  id        Returns the id, or nil when nothing is known of this job
if redis.call('EXISTS', STATE) == 0 then return nil end
redis.call('HSETNX', STATE, 'next', ARGV[1])
return redis.call('HGET', STATE, 'next')
