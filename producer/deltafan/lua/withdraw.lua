-- Forgets a job that the queue's own server refused because it was full.  ARGV  ticket of the submit that made it known
-- Returns 1, or 0 when somebody else has submitted it meanwhile: then it is theirs, and in the queue.
if redis.call('HGET', STATE, 'ticket') ~= ARGV[1] then return 0 end
redis.call('DEL', STATE, REQUEST)
return 1
