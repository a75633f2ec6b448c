-- A provider has asked for less, or for money: all workers leave it alone for a while.
-- ARGV  3 group, 4 'rate' | 'quota' (of the account) | 'model_quota', 5 for how long (ms), 6 its words
local names = scopes_of(ARGV[3])
local s = scope(ARGV[4] == 'quota' and names[1] or names[2])
local since = tonumber(redis.call('GET', FLAG)) or NOW -- all calls are counted since
local closed = math.max(s.closed or 0, NOW + ARGV[5])
redis.call('HSET', s.key, 'closed', digits(closed))
if ARGV[4] ~= 'rate' then
  redis.call('HSET', s.key, 'quota', ARGV[6])
elseif NOW - since >= PACE_S * 1000 and (s.learned_ms or 0) < NOW - PACE_S * 1000 then
  -- Before that too little is counted to tell a rate; and refusals that arrive together count once.
  local learned = 0.7 * math.min(rate(s), learned_rate(s) or math.huge)
  redis.call('HSET', s.key, 'learned', string.format('%.1f', math.max(60 / PACE_S, learned)), 'learned_ms', digits(NOW))
end
s.closed = closed
keep(s)
redis.call('SET', FLAG, digits(since), 'PX', digits(math.max(600000, closed - NOW + 60000)))
