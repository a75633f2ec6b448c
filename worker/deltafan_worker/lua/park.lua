-- Gives a claim back until the limits of the job's model have room: `claim` takes it from the lot then.
-- KEYS  queue      ARGV  3 group, 4 '<input tokens> <most output tokens, or nothing>', 5 token of the claim, 6 id, 7 score,
--                        8 when it is due anyway (ms, '' an hour)
-- Returns 1, or 0 when the lease is another's
local queue, id, in_progress = KEYS[1], ARGV[6], 'arq:in-progress:' .. ARGV[6]
if redis.call('GET', in_progress) ~= ARGV[5] then return 0 end

-- The place whose turn it is in a fair queue; nil in another.
local function turn()
  local first
  local function look(found)
    local place = tonumber(found[2])
    if place and place < FIRST_TIME and (not first or place < first) then first = place end
  end
  look(redis.call('ZRANGEBYSCORE', queue, FIRST_PLACE, '(' .. digits(FIRST_TIME), 'WITHSCORES', 'LIMIT', 0, 1))
  for _, group in ipairs(redis.call('SMEMBERS', queue .. ':lots')) do
    look(redis.call('ZRANGE', lot_of(queue, group), 0, 0, 'WITHSCORES'))
  end
  return first or redis.call('EXISTS', queue .. ':places') == 1 and FIRST_PLACE or nil
end

-- A lease that ended, or was given back, has left a time instead of the job's place, and behind that are all places.
local lot, score = lot_of(queue, ARGV[3]), ARGV[7]
if tonumber(score) >= FIRST_TIME then score = turn() or score end
redis.call('ZADD', lot, 'NX', score, id)
redis.call('HSET', lot .. ':tokens', id, ARGV[4])
redis.call('SADD', queue .. ':lots', ARGV[3])
keep(scope(ARGV[3]))
for _, key in ipairs({ lot, lot .. ':tokens', queue .. ':lots' }) do redis.call('PEXPIRE', key, 3 * KEEP_MS) end
-- Waiting, to arq; and should the lot be lost, it comes back by itself.
redis.call('ZADD', queue, 'XX', digits(math.min(NOW + KEEP_MS, tonumber(ARGV[8]) or math.huge)), id)
redis.call('DEL', in_progress)
return 1
