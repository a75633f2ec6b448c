-- Takes due jobs from the queues, in their order, up to `want`.
-- KEYS  queues          ARGV  process, lease_ms, want, fresh_only (1: leave jobs that were claimed before to their
-- workers for a moment, which may just have been unable to renew their leases)
-- Returns {ms until the next job is due or -1, {id, queue index, score, claim number, …}}
-- The in-progress key is the lock; the score is a hint that takes a running job off the head of the queue and
-- makes it due again by itself when its lease ends.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease_ms, want = tonumber(ARGV[2]), tonumber(ARGV[3])
local taken, soonest = {}, -1

local function take(index, id, score)
  local in_progress = 'arq:in-progress:' .. id
  local left = redis.call('PTTL', in_progress)
  if left ~= -2 then
    redis.call('ZADD', KEYS[index], 'XX', now + math.max(1, left < 0 and lease_ms or math.min(left, lease_ms)), id)
  elseif redis.call('EXISTS', 'arq:job:' .. id) == 0 and redis.call('EXISTS', 'arq:result:' .. id) == 1 then
    redis.call('ZREM', KEYS[index], id) -- finished, then put back by a late Job.abort()
  elseif ARGV[4] == '1' and redis.call('EXISTS', 'arq:retry:' .. id) == 1 then
    redis.call('ZADD', KEYS[index], 'XX', now + lease_ms / 2, id)
  else
    local number = redis.call('INCR', 'arq:retry:' .. id)
    redis.call('EXPIRE', 'arq:retry:' .. id, 88400)
    redis.call('SET', in_progress, ARGV[1] .. ':' .. number, 'PX', lease_ms)
    redis.call('ZADD', KEYS[index], 'XX', now + lease_ms, id)
    for _, value in ipairs({ id, index, score, number }) do taken[#taken + 1] = value end
  end
end

for index = 1, #KEYS do
  while #taken < want * 4 do
    local due = redis.call('ZRANGEBYSCORE', KEYS[index], '-inf', now, 'WITHSCORES', 'LIMIT', 0, want - #taken / 4)
    if #due == 0 then break end
    for i = 1, #due, 2 do take(index, due[i], due[i + 1]) end
  end
  local head = redis.call('ZRANGE', KEYS[index], 0, 0, 'WITHSCORES')
  if head[2] then
    local wait = math.max(0, math.ceil(head[2] - now))
    if soonest < 0 or wait < soonest then soonest = wait end
  end
end
return { soonest, taken }
