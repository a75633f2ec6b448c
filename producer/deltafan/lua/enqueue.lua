-- Writes arq's job record and queue entry, and rings.  One definition for both ways to reach it: alone on the
-- queue's server, or behind submit.lua in the same call when both live on one server.
--   tenant whose turn it is decides the order; false: first come, first served
-- is_queued(…): whether that has been done, by whoever died before we were told, and is not over.
-- waiting(queue): how many jobs nobody has claimed; a claimed one's score is the end of its lease.
-- A result that arq still keeps does not stand in the way: the job's own state decides whether it may run.
local NOW -- the same throughout a script
local function server_ms()
  if not NOW then
    local time = redis.call('TIME')
    NOW = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return NOW
end

-- Jobs that wait for the limits of their model; see limits.lua of the worker.
local function lots(queue)
  local names = redis.call('SMEMBERS', queue .. ':lots')
  for i, group in ipairs(names) do names[i] = queue .. ':lot:' .. group end
  return names
end

local function waiting(queue)
  local count = redis.call('ZCOUNT', queue, '-inf', server_ms())
  for _, lot in ipairs(lots(queue)) do count = count + redis.call('ZCARD', lot) end
  return count
end

-- A place in a fair queue: start-time fair queueing, where each job is as long as any other.  A tenant's next place is
-- one behind its last, but never behind the place whose turn it is now: so tenants take turns, whatever each has waiting.
-- Places are far below the times that are scores of other jobs, and 1 is arq's for what is to be aborted.
local FIRST_PLACE, FIRST_TIME = 2, '1000000000000'

local function whose_turn(queue, places)
  local turn
  local function look(found)
    local head = tonumber(found[2])
    if head and head < tonumber(FIRST_TIME) and (not turn or head < turn) then turn = head end
  end
  look(redis.call('ZRANGEBYSCORE', queue, FIRST_PLACE, '(' .. FIRST_TIME, 'WITHSCORES', 'LIMIT', 0, 1))
  for _, lot in ipairs(lots(queue)) do look(redis.call('ZRANGE', lot, 0, 0, 'WITHSCORES')) end
  if turn then redis.call('ZREMRANGEBYSCORE', places, '-inf', '(' .. turn - 1) else redis.call('DEL', places) end
  return turn or FIRST_PLACE
end

local TURN -- of the one queue that a script writes to; what it adds there is never before that, so once is enough
local function place(queue, tenant)
  local places, is_first = queue .. ':places', not TURN
  TURN = TURN or whose_turn(queue, places)
  local last = redis.call('ZSCORE', places, tenant)
  local mine = math.max(TURN, last and last + 1 or 0)
  redis.call('ZADD', places, mine, tenant)
  if is_first then redis.call('PEXPIRE', places, 86400000) end
  return mine
end

local function is_queued(job, in_progress, result)
  if redis.call('EXISTS', job, in_progress, result) == 0 then return false end
  if redis.call('EXISTS', job, in_progress) > 0 then return true end
  redis.call('DEL', result)
  return false
end

local function enqueue(job, queue, id, record, ttl_ms, tenant)
  redis.call('SET', job, record, 'PX', ttl_ms)
  redis.call('ZADD', queue, tenant and place(queue, tenant) or server_ms(), id)
end

-- Wakes idle workers.  Tokens are hints; a few dozen wake any fleet, and idle doorbells disappear.
local function ring(doorbell, times)
  if times == 0 then return end
  local room = 64 - redis.call('LLEN', doorbell)
  for _ = 1, math.min(times, room) do redis.call('LPUSH', doorbell, 1) end
  if room > 0 then redis.call('PEXPIRE', doorbell, 60000) end
end
