-- Gives a claim back until the limits of the job's model have room: `claim` takes it from the lot then.
-- KEYS  queue      ARGV  3 group, 4 tokens, 5 token of the claim, 6 id, 7 score, 8 when it is due anyway (ms, '' an hour)
-- Returns 1, or 0 when the lease is another's
local queue, id, in_progress = KEYS[1], ARGV[6], 'arq:in-progress:' .. ARGV[6]
if redis.call('GET', in_progress) ~= ARGV[5] then return 0 end
local lot = lot_of(queue, ARGV[3])
redis.call('ZADD', lot, 'NX', ARGV[7], id)
redis.call('HSET', lot .. ':tokens', id, ARGV[4])
redis.call('SADD', queue .. ':lots', ARGV[3])
keep(scope(ARGV[3]))
for _, key in ipairs({ lot, lot .. ':tokens', queue .. ':lots' }) do redis.call('PEXPIRE', key, 3 * KEEP_MS) end
-- Waiting, to arq; and should the lot be lost, it comes back by itself.
redis.call('ZADD', queue, 'XX', digits(math.min(NOW + KEEP_MS, tonumber(ARGV[8]) or math.huge)), id)
redis.call('DEL', in_progress)
return 1
