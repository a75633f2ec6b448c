"""Time that passes for the fleet's limits alone."""

from redis.asyncio import Redis

PASS = """
for _, name in ipairs(redis.call('SMEMBERS', 'deltafan:limits')) do
  local key = 'deltafan:limit:' .. name
  local flat = redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    local kind, cell = string.match(flat[i], '^([rt])(%d+)$')
    if kind then
      redis.call('HDEL', key, flat[i])
    elseif flat[i] == 'closed' or flat[i] == 'urgent' or flat[i] == 'learned_ms' then
      redis.call('HINCRBY', key, flat[i], -1000 * ARGV[1])
    end
  end
  for i = 1, #flat, 2 do
    local kind, cell = string.match(flat[i], '^([rt])(%d+)$')
    if kind then redis.call('HINCRBY', key, kind .. string.format('%.0f', cell - ARGV[1]), flat[i + 1]) end
  end
  redis.call('PEXPIRE', key, 600000) -- it may have been gone for a moment
end
local since = redis.call('GET', 'deltafan:limit')
if since then redis.call('SET', 'deltafan:limit', string.format('%.0f', since - 1000 * ARGV[1]), 'KEEPTTL') end
"""


async def pass_time(redis: Redis, seconds: int) -> None:
    """As if everything the limits know were so much older."""
    await redis.execute_command("EVAL", PASS, 0, seconds)
