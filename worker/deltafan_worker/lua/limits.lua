-- The limits of providers and their models, for the whole fleet.  Used by scripts of the queue's server whose
-- ARGV[1] is the start of the limits' keys and ARGV[2] the share of a limit that batch jobs leave free while there are
-- interactive ones.
-- A scope is `provider` or `provider/model`.  Its hash holds what is allowed (rpm, tpm, concurrency), what was taken
-- in each of the last seconds (r<second> requests, t<second> tokens) and what the provider has said (closed, quota,
-- learned).  Any minute lies within 61 such cells, so what stays below a limit in those stays below it in every minute.
local LIMITS, RESERVE = ARGV[1], tonumber(ARGV[2])
local FLAG, KNOWN = string.sub(LIMITS, 1, -2), string.sub(LIMITS, 1, -2) .. 's'
local CELLS, PACE_S, KEEP_MS, PROBE_MS = 61, 5, 3600000, 10000
local FIRST_PLACE, FIRST_TIME = 2, 1000000000000 -- scores of jobs in a fair queue are places, smaller than any time
local LONGEST_OUTPUT = 8192 -- as much as most models give who are not told to give less

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function digits(number)
  return string.format('%.0f', number)
end

local NOW = now_ms()
local SECOND = math.floor(NOW / 1000)
local scopes = {}

local function scope(name)
  if scopes[name] then return scopes[name] end
  local s = { key = LIMITS .. name, r = 0, t = 0, paced_r = 0, paced_t = 0 }
  local flat, stale = redis.call('HGETALL', s.key), {}
  for i = 1, #flat, 2 do
    local kind, cell = string.match(flat[i], '^([rt])(%d+)$')
    if not kind then
      s[flat[i]] = tonumber(flat[i + 1]) or flat[i + 1]
    elseif tonumber(cell) <= SECOND - CELLS then
      stale[#stale + 1] = flat[i]
    else
      s[kind] = s[kind] + flat[i + 1]
      if tonumber(cell) > SECOND - PACE_S then s['paced_' .. kind] = s['paced_' .. kind] + flat[i + 1] end
    end
  end
  if #stale > 0 then redis.call('HDEL', s.key, unpack(stale)) end
  scopes[name] = s
  return s
end

local function keep(s)
  local ms = digits(math.max(0, (s.closed or 0) - NOW) + KEEP_MS)
  redis.call('PEXPIRE', s.key, ms)
  redis.call('SADD', KNOWN, string.sub(s.key, #LIMITS + 1))
  redis.call('PEXPIRE', KNOWN, ms)
end

-- `provider` and `provider/model`: a call counts for both.
local function scopes_of(group)
  return { string.match(group, '^[^/]+'), group }
end

-- Requests per minute, as fast as they went lately.
local function rate(s)
  return math.max(s.r, s.paced_r * 60 / PACE_S)
end

-- The rate that a provider's refusals have taught doubles every half minute, until nothing is left of the lesson.
local function learned_rate(s)
  return s.learned and s.learned * 2 ^ ((NOW - s.learned_ms) / 30000)
end

-- The lesson is a guess, and nobody who is waited for is held up for it.
local function is_too_fast(s, urgent)
  local most = not urgent and learned_rate(s)
  return most and s.paced_r >= most * PACE_S / 60
end

-- What is larger than a whole limit goes when nothing else does.
local function is_full(used, more, limit, paced, urgent, share)
  if not limit then return false end
  if used > 0 and used + more > limit * share then return true end
  return not urgent and paced >= limit * PACE_S / 60
end

-- Who runs is whoever holds a lease: what a dead worker held is found when the limit is reached.
local function has_slot(s, share)
  local running, most = s.key .. ':running', math.max(1, math.floor(s.concurrency * share))
  s.held = s.held or redis.call('SCARD', running)
  if s.held < most or (s.pruned or 0) > NOW - 1000 then return s.held < most end
  for _, held in ipairs(redis.call('SMEMBERS', running)) do
    local id = string.match(held, '^[^ ]+')
    if redis.call('EXISTS', 'arq:in-progress:' .. id) == 0 then s.held = s.held - redis.call('SREM', running, held) end
  end
  s.pruned = NOW
  redis.call('HSET', s.key, 'pruned', digits(NOW))
  return s.held < most
end

local function fits(name, tokens, urgent)
  local s = scope(name)
  if not urgent and (s.closed or 0) > NOW then return false end
  local share = (urgent or (s.urgent or 0) < NOW - 60000) and 1 or 1 - RESERVE
  if tokens > (s.tpm or math.huge) * share then share = 1 end -- what is larger than the share may have all
  if is_too_fast(s, urgent) then return false end
  if is_full(s.r, 1, s.rpm, s.paced_r, urgent, share) then return false end
  if is_full(s.t, tokens, s.tpm, s.paced_t, urgent, share) then return false end
  return not s.concurrency or has_slot(s, share)
end

local function may_call(group, tokens, urgent)
  for _, name in ipairs(scopes_of(group)) do
    if not fits(name, tokens, urgent) then return false end
  end
  return true
end

-- Returns the grant's number: of two calls of one job, each gives its own place back.
local function charge(group, tokens, urgent, id)
  local grant = digits(redis.call('HINCRBY', LIMITS .. group, 'grants', 1))
  for _, name in ipairs(scopes_of(group)) do
    local s = scope(name)
    s.r, s.paced_r, s.t, s.paced_t = s.r + 1, s.paced_r + 1, s.t + tokens, s.paced_t + tokens
    redis.call('HINCRBY', s.key, 'r' .. digits(SECOND), 1)
    redis.call('HINCRBY', s.key, 't' .. digits(SECOND), digits(tokens))
    if urgent then
      s.urgent = NOW
      redis.call('HSET', s.key, 'urgent', digits(NOW))
    end
    if s.concurrency then
      s.held = (s.held or redis.call('SCARD', s.key .. ':running')) + redis.call('SADD', s.key .. ':running', id .. ' ' .. grant)
      redis.call('PEXPIRE', s.key .. ':running', KEEP_MS)
    end
    if s.quota and not urgent then -- this call tells whether there is money again; the others wait for it
      s.closed = NOW + PROBE_MS
      redis.call('HSET', s.key, 'closed', digits(s.closed))
    end
    keep(s)
  end
  return grant
end

-- How many tokens a call will use.  As long as no answer has told what is usual there, as many as it may; and what
-- may be endless counts so much that only a few such calls are made before one of them has ended.
local function estimate(group, input, most)
  local output = scope(group).mean
  if output then
    output = math.min(most or output, output)
  elseif most then
    output = most
  else
    output = LONGEST_OUTPUT
    for _, name in ipairs(scopes_of(group)) do output = math.min(output, (scope(name).tpm or math.huge) / 2) end
  end
  return math.ceil(input + output)
end

-- Where jobs of one queue wait for the limits of one provider's model, in the order in which they came to the queue.
local function lot_of(queue, group)
  return queue .. ':lot:' .. group
end

-- The same for a job that waits there: as answers are now, not as they were when it came.
local function estimate_of(lot, group, id)
  local input, most = string.match(redis.call('HGET', lot .. ':tokens', id) or '', '^(%d+) ?(%d*)$')
  return input and estimate(group, tonumber(input), tonumber(most)) or 0
end
