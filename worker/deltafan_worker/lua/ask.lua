-- May a call be made now?  It is counted if so.
-- ARGV  3 group, 4 input tokens, 5 most output tokens ('' unbounded), 6 urgent ('1' | '0'), 7 id,
--       8 queue, or '' for a call that need not stand in line, 9.. rpm, tpm, concurrency ('' none) of provider, then model
-- Returns {1 | 0, second it is counted in, tokens counted, grant}
local group, urgent = ARGV[3], ARGV[6] == '1'
for i, name in ipairs(scopes_of(group)) do
  local s = scope(name)
  for j, field in ipairs({ 'rpm', 'tpm', 'concurrency' }) do
    local value = tonumber(ARGV[5 + 3 * i + j])
    if s[field] ~= value then
      if value then redis.call('HSET', s.key, field, ARGV[5 + 3 * i + j]) else redis.call('HDEL', s.key, field) end
      s[field] = value
    end
  end
  keep(s)
end
local tokens = estimate(group, tonumber(ARGV[4]), tonumber(ARGV[5]))
local others_wait = ARGV[8] ~= '' and redis.call('EXISTS', lot_of(ARGV[8], group)) == 1
if others_wait or not may_call(group, tokens, urgent) then return { 0, SECOND, tokens, '' } end
return { 1, SECOND, tokens, charge(group, tokens, urgent, ARGV[7]) }
