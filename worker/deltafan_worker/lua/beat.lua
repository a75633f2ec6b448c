-- Renews the leases of one process.  KEYS  queues      ARGV  lease_ms, then token, id, queue index for each claim
-- Returns, for each claim, 'M' still mine (or taken again: the lease had run out and nobody had claimed) |
-- 'N' no trace of the job on this server: go on | 'L' lost to another claim | 'A' mine, and an abort was requested (whoever ends the job
-- forgets that)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease_ms, answers = tonumber(ARGV[1]), {}
for i = 2, #ARGV, 3 do
  local token, id, queue = ARGV[i], ARGV[i + 1], KEYS[tonumber(ARGV[i + 2])]
  local in_progress = 'arq:in-progress:' .. id
  local holder = redis.call('GET', in_progress)
  local answer = 'M'
  if holder and holder ~= token then
    answer = 'L'
  elseif not holder and not redis.call('ZSCORE', queue, id) then
    answer = 'N'
  else
    -- A server without memory refuses SET where it is a script's first write: all leases would end.
    if holder then
      redis.call('PEXPIRE', in_progress, lease_ms)
    else
      redis.call('SET', in_progress, token, 'PX', lease_ms)
    end
    redis.call('ZADD', queue, 'XX', now + lease_ms, id)
    if redis.call('ZSCORE', 'arq:abort', id) then answer = 'A' end
  end
  answers[#answers + 1] = answer
end
return answers
