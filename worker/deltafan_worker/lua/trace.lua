-- What the queue's server knows of a job.
-- KEYS  arq job, in-progress, billed, queues      ARGV  id, model calls
-- Returns {'HELD' in a queue or leased | 'RECORD' its record alone is there | 'NONE', calls that are not in the ledger}
local where = redis.call('EXISTS', KEYS[1]) == 1 and 'RECORD' or 'NONE'
if redis.call('EXISTS', KEYS[2]) == 1 then where = 'HELD' end
for i = 4, #KEYS do
  if redis.call('ZSCORE', KEYS[i], ARGV[1]) then where = 'HELD' end
end
local unbilled = {}
for i = 2, #ARGV do
  if redis.call('SISMEMBER', KEYS[3], ARGV[i]) == 0 then unbilled[#unbilled + 1] = ARGV[i] end
end
return { where, unbilled }
