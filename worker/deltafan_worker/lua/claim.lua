-- Takes jobs from the queues, up to `want`.
-- KEYS  queues      ARGV  3 process, 4 lease_ms, 5 want, 6 fresh_only (1: leave jobs that were claimed before to their
-- workers for a moment, which may just have been unable to renew their leases), 7 index of the queue whose jobs are
-- urgent (0 none), 8.. (queue index, how many of it in all so far) for each pass, in order
-- Returns {ms until the next job may be due or -1, {id, queue index, score, claim number, 1 when its abort was
-- requested, arq's record or nil, group whose limits count it, tokens, grant, or '', …}, {for each queue 1 when due jobs
-- are left}, second, 1 when some provider has asked for less}
-- Of a queue that it leaves nothing due in, while there was room for more, it silences the doorbell.
-- The record comes with the claim, so that both are the same server's: the name may lead to another one meanwhile.
-- The in-progress key is the lock; the score is a hint that takes a running job off the head of the queue and
-- makes it due again by itself when its lease ends.  Times are scores of the jobs that were due before: their leases
-- ended, or they were given back.  They go first.  What is smaller than any time is a place in a fair queue.
-- Large records are claimed in portions: the server does nothing else meanwhile.
local PORTION_BYTES = 1048576
local STEP_BACK_MS = 70000
local lease_ms, want, taken, total, counts, bytes = tonumber(ARGV[4]), tonumber(ARGV[5]), {}, 0, {}, 0

local function lock(index, id, score, group)
  local in_progress = 'arq:in-progress:' .. id
  local left = redis.call('PTTL', in_progress)
  if left ~= -2 then
    local again = NOW + math.max(1, left < 0 and lease_ms or math.min(left, lease_ms))
    redis.call('ZADD', KEYS[index], 'XX', digits(again), id)
  elseif redis.call('EXISTS', 'arq:job:' .. id) == 0 and redis.call('EXISTS', 'arq:result:' .. id) == 1 then
    redis.call('ZREM', KEYS[index], id) -- finished, then put back by a late Job.abort()
    redis.call('ZREM', 'arq:abort', id)
  elseif ARGV[6] == '1' and group == '' and redis.call('EXISTS', 'arq:retry:' .. id) == 1 then
    redis.call('ZADD', KEYS[index], 'XX', digits(NOW + lease_ms / 2), id)
  else
    local number = redis.call('INCR', 'arq:retry:' .. id)
    redis.call('EXPIRE', 'arq:retry:' .. id, 88400)
    redis.call('SET', in_progress, ARGV[3] .. ':' .. number, 'PX', lease_ms)
    redis.call('ZADD', KEYS[index], 'XX', digits(NOW + lease_ms), id)
    local aborted = redis.call('ZSCORE', 'arq:abort', id) and 1 or 0
    local record = redis.call('GET', 'arq:job:' .. id)
    for _, value in ipairs({ id, index, score, number, aborted, record, group }) do taken[#taken + 1] = value end
    counts[index], total, bytes = counts[index] + 1, total + 1, bytes + #(record or '')
    return true
  end
  return false
end

local function room(index, most, most_bytes)
  return bytes < (most_bytes or PORTION_BYTES) and math.min(most - counts[index], want - total) or 0
end

local function from_range(index, most, low, high)
  while room(index, most) > 0 do
    local due = redis.call('ZRANGEBYSCORE', KEYS[index], low, high, 'WITHSCORES', 'LIMIT', 0, room(index, most))
    if #due == 0 then return end
    for i = 1, #due, 2 do
      if room(index, most) > 0 then lock(index, due[i], due[i + 1], '') end
    end
  end
end

-- A large job goes when nothing else has used its minute up. If others, who do not stand in this line, keep it from that,
-- the smaller ones behind it have their turn first.
local function step_back(lot, id)
  local since, head = string.match(redis.call('HGET', lot .. ':tokens', ' head') or '', '^(%d+) (.*)$')
  if head ~= id then
    redis.call('HSET', lot .. ':tokens', ' head', digits(NOW) .. ' ' .. id)
  elseif NOW - since > STEP_BACK_MS then
    redis.call('HDEL', lot .. ':tokens', ' head')
    redis.call('ZADD', lot, redis.call('ZRANGE', lot, -1, -1, 'WITHSCORES')[2] + 1, id)
  end
end

local function from_lot(index, most, most_bytes, group)
  local lot, urgent = lot_of(KEYS[index], group), index == tonumber(ARGV[7])
  while room(index, most, most_bytes) > 0 do
    local id, score = unpack(redis.call('ZRANGE', lot, 0, 0, 'WITHSCORES'))
    if not id then
      redis.call('SREM', KEYS[index] .. ':lots', group)
      return
    end
    local tokens = estimate_of(lot, group, id)
    if not may_call(group, tokens, urgent) then
      if may_call(group, 0, urgent) then step_back(lot, id) end
      return
    end
    redis.call('ZREM', lot, id)
    redis.call('HDEL', lot .. ':tokens', id)
    -- One that is not in the queue has ended meanwhile.
    if redis.call('ZSCORE', KEYS[index], id) and lock(index, id, score, group) then
      taken[#taken] = group .. ' ' .. digits(tokens) .. ' ' .. charge(group, tokens, urgent, id)
    end
  end
end

local function from_lots(index, most, most_bytes)
  local groups = redis.call('SMEMBERS', KEYS[index] .. ':lots')
  for i = 1, #groups do from_lot(index, most, most_bytes, groups[(SECOND + i) % #groups + 1]) end
end

local most_of = {}
for index = 1, #KEYS do counts[index] = 0 end
for i = 8, #ARGV, 2 do
  local index, most = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  most_of[index] = math.max(most_of[index] or 0, most)
  -- Those in line have half of the room, and of the bytes; the others what is left, and what they leave is theirs again.
  from_lots(index, counts[index] + math.floor((room(index, most) + SECOND % 2) / 2), (bytes + PORTION_BYTES) / 2)
  from_range(index, most, digits(FIRST_TIME), digits(NOW))
  from_range(index, most, '-inf', '(' .. digits(FIRST_TIME))
  from_lots(index, most)
end

local function has_room_for_one(index)
  for _, group in ipairs(redis.call('SMEMBERS', KEYS[index] .. ':lots')) do
    local lot = lot_of(KEYS[index], group)
    local id = redis.call('ZRANGE', lot, 0, 0)[1]
    if id and may_call(group, estimate_of(lot, group, id), index == tonumber(ARGV[7])) then return true end
  end
  return false
end

local soonest, left = -1, {}
local function wait(ms)
  if soonest < 0 or ms < soonest then soonest = math.max(0, math.ceil(ms)) end
end
for index = 1, #KEYS do
  local head = redis.call('ZRANGE', KEYS[index], 0, 0, 'WITHSCORES')[2]
  left[index] = (head and tonumber(head) <= NOW or has_room_for_one(index)) and 1 or 0
  if room(index, most_of[index] or 0) > 0 then
    if left[index] == 0 then redis.call('DEL', KEYS[index] .. ':bell') end -- what it rang for has been taken
    if head then wait(head - NOW) end
    if redis.call('EXISTS', KEYS[index] .. ':lots') == 1 then wait(1000 - NOW % 1000) end
  end
end
return { soonest, taken, left, SECOND, redis.call('EXISTS', FLAG) }
