-- A call that was counted is over: corrects its tokens and frees its place.
-- KEYS  queues      ARGV  3 group, 4 id, 5 second, 6 tokens counted, 7 tokens used ('' unknown), 8 of them output ('' unknown),
--                         9 '1' when the provider gave an answer, 10 grant
local group, id, counted_in, counted = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local more = (tonumber(ARGV[7]) or counted) - counted
local freed = 0
for _, name in ipairs(scopes_of(group)) do
  local key = LIMITS .. name
  freed = freed + redis.call('SREM', key .. ':running', id .. ' ' .. ARGV[10])
  if redis.call('EXISTS', key) == 1 then
    if more > 0 then
      redis.call('HINCRBY', key, 't' .. digits(SECOND), more)
    elseif more < 0 and counted_in > SECOND - CELLS then
      redis.call('HINCRBY', key, 't' .. digits(counted_in), more)
    end
    if ARGV[9] == '1' and redis.call('HDEL', key, 'quota') == 1 then redis.call('HDEL', key, 'closed') end
  end
end
local mean = tonumber(redis.call('HGET', LIMITS .. group, 'mean') or ARGV[8])
if mean and ARGV[8] ~= '' and redis.call('EXISTS', LIMITS .. group) == 1 then
  redis.call('HSET', LIMITS .. group, 'mean', string.format('%.1f', mean + (ARGV[8] - mean) / 16))
end
if freed == 0 then return end
for _, queue in ipairs(KEYS) do
  local doorbell = queue .. ':bell'
  if redis.call('EXISTS', queue .. ':lots') == 1 and redis.call('LLEN', doorbell) < 64 then
    redis.call('LPUSH', doorbell, 1)
    redis.call('PEXPIRE', doorbell, 60000)
  end
end
