-- A call that was counted is over: corrects its tokens and frees its place.
-- KEYS  queues      ARGV  3 group, 4 id, 5 second, 6 tokens counted, 7 tokens used ('' unknown), 8 of them output ('' unknown),
--                         9 '1' when the provider gave an answer, 10 grant, 11 '0' when nothing was called after all,
--                         12 who tells it, 13 the number of what it tells, to know a repeat by
local told = KNOWN .. ':told:' .. ARGV[12]
if redis.call('GET', told) == ARGV[13] then return end
redis.call('SET', told, ARGV[13], 'PX', KEEP_MS)
local UNCOUNTED_OUTPUT = 500 -- of providers that do not count
local group, id, counted_in, counted = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local more = (tonumber(ARGV[7]) or counted) - counted
local freed, is_made = 0, ARGV[11] == '1'

-- Takes back what was counted too much, if it still counts.
local function take_back(key, kind, amount)
  local cell = kind .. digits(counted_in)
  if counted_in > SECOND - CELLS and redis.call('HEXISTS', key, cell) == 1 then redis.call('HINCRBY', key, cell, amount) end
end

for _, name in ipairs(scopes_of(group)) do
  local key = LIMITS .. name
  freed = freed + redis.call('SREM', key .. ':running', id .. ' ' .. ARGV[10])
  if redis.call('EXISTS', key) == 1 then
    if not is_made then
      take_back(key, 'r', -1)
      if redis.call('HEXISTS', key, 'quota') == 1 then redis.call('HDEL', key, 'closed') end -- another is to try
    end
    if more > 0 then
      redis.call('HINCRBY', key, 't' .. digits(SECOND), more)
    elseif more < 0 then
      take_back(key, 't', more)
    end
    if ARGV[9] == '1' and redis.call('HDEL', key, 'quota') == 1 then redis.call('HDEL', key, 'closed') end
  end
end

-- What answers use there: the mean of the first ones, then one that follows what changes.
local key, output = LIMITS .. group, tonumber(ARGV[8])
if ARGV[9] == '1' and redis.call('EXISTS', key) == 1 then
  if output then
    local weight = math.min(16, redis.call('HINCRBY', key, 'answers', 1))
    local mean = tonumber(redis.call('HGET', key, 'mean') or 0)
    redis.call('HSET', key, 'mean', string.format('%.1f', mean + (output - mean) / weight))
  else
    redis.call('HSETNX', key, 'mean', UNCOUNTED_OUTPUT)
  end
end
if freed == 0 and is_made then return end
for _, queue in ipairs(KEYS) do
  local doorbell = queue .. ':bell'
  if redis.call('EXISTS', queue .. ':lots') == 1 and redis.call('LLEN', doorbell) < 64 then
    redis.call('LPUSH', doorbell, 1)
    redis.call('PEXPIRE', doorbell, 60000)
  end
end
