-- Forgets a job that the queue's own server refused because it was full.  ARGV  ticket of the submit that made it known
-- Returns 1, or 0 when somebody else has submitted it meanwhile: then it is theirs, and in the queue.  2 when it has run
-- already: the queue's server had taken it, before that was lost and asked again.
local state = redis.call('HMGET', STATE, 'ticket', 'status', 'attempt')
if state[1] ~= ARGV[1] then return 0 end
if state[2] ~= 'queued' or state[3] ~= '0' then return 2 end
redis.call('DEL', STATE, REQUEST)
return 1
