-- A provider has asked for less, or for money: all workers leave it alone for a while.
-- ARGV  3 group, 4 'rate' | 'quota', 5 for how long (ms), 6 its words
local names = scopes_of(ARGV[3])
local s = scope(ARGV[4] == 'quota' and names[1] or names[2])
local closed = math.max(s.closed or 0, NOW + ARGV[5])
redis.call('HSET', s.key, 'closed', digits(closed))
if ARGV[4] == 'quota' then
  redis.call('HSET', s.key, 'quota', ARGV[6])
elseif s.r > 0 and (s.learned_ms or 0) < NOW - PACE_S * 1000 then -- refusals that arrive together count once
  local learned = 0.7 * math.min(s.r, requests_per_minute(s) or s.r)
  redis.call('HSET', s.key, 'learned', string.format('%.1f', math.max(6, learned)), 'learned_ms', digits(NOW))
end
s.closed = closed
keep(s)
redis.call('SET', FLAG, 1, 'PX', digits(math.max(600000, closed - NOW + 60000)))
