-- Writes a job's usage records into the ledger, each model call once, and tells arq that the job is done.
-- KEYS  queue, ledger, billed
-- ARGV  1 token, 2 id, 3 arq result ('' for none), 4 arq result ttl_ms (-1: for ever), 5 billed ttl_ms, 6 ledger length,
--       then call, record for each model call
-- Returns 1, or 0 when the lease is another's: the records are written all the same, arq is left alone.
for i = 7, #ARGV, 2 do
  if redis.call('SADD', KEYS[3], ARGV[i]) == 1 then
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[6], '*', 'job', ARGV[2], 'call', ARGV[i], 'data', ARGV[i + 1])
  end
end
if #ARGV > 6 then redis.call('PEXPIRE', KEYS[3], ARGV[5]) end
local id, in_progress = ARGV[2], 'arq:in-progress:' .. ARGV[2]
if redis.call('GET', in_progress) ~= ARGV[1] then return 0 end
redis.call('DEL', in_progress, 'arq:job:' .. id, 'arq:retry:' .. id)
redis.call('ZREM', KEYS[1], id)
redis.call('ZREM', 'arq:abort', id)
if ARGV[3] ~= '' then
  if tonumber(ARGV[4]) > 0 then
    redis.call('SET', 'arq:result:' .. id, ARGV[3], 'PX', ARGV[4])
  else
    redis.call('SET', 'arq:result:' .. id, ARGV[3])
  end
end
return 1
