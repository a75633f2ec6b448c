-- Whether the job has ended, asked before a WAIT on the same connection: what changes nothing is written, so that the
-- WAIT has something to wait for.
-- Returns 1, or 0 when it has not: the server that answered before has been replaced
touch()
return ended(redis.call('HGET', STATE, 'status')) and 1 or 0
