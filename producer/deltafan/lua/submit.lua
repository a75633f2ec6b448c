-- Makes jobs known, each once; one after the other, and nothing comes between them.
-- KEYS  of each job events, state, result [, arq job, in-progress, result]; behind those of all [queue, doorbell]
-- ARGV  live_ms, ticket ('' or one of this submit's own: see withdraw), max_queued ('' for no limit), queue_ms ('' where
--       the queue's keys are not given), rings, fair ('1' | '0'); then of each job digest, deadline_ms ('' for none)
--       [, id, record, tenant]
-- Returns of each job {'NEW' | 'EXISTS' | 'CONFLICT', status}, or {'FULL', how many wait}: nothing is written.  With the
-- queue's keys it enqueues as well, also when the job is known but has not ended: a submit that died between its two
-- writes is mended by the next.  Of those that it enqueues so many ring as `rings` says.  An error in between, as of a
-- key that is not ours, leaves the jobs behind it unmade: the submit of all of them is to be repeated.
local LIVE_MS, TICKET, MAX_QUEUED, QUEUE_MS, RINGS, FAIR = unpack(ARGV, 1, 6)
local TOGETHER = QUEUE_MS ~= ''
local KEYS_EACH, ARGS_EACH = TOGETHER and 6 or 3, TOGETHER and 5 or 2
local QUEUE, DOORBELL = KEYS[#KEYS - 1], KEYS[#KEYS]

-- The status of a job that is known, and the digest of its request.
local function known()
  local state = redis.call('HMGET', STATE, 'status', 'digest')
  if state[1] or redis.call('EXISTS', EVENTS, RESULT) > 0 then return ended(state[1]) or state[1], state[2] end
end

local function submit(is_new, keys, given, deadline_ms)
  local status, digest
  if not is_new then status, digest = known() end
  if status then
    if digest and digest ~= given then return { 'CONFLICT', status } end
    redis.call('HDEL', STATE, 'ticket')
    touch()
    return { 'EXISTS', status }
  end
  if TOGETHER and MAX_QUEUED ~= '' and (is_new or redis.call('EXISTS', KEYS[keys + 3], KEYS[keys + 4]) == 0) then
    local count = waiting(QUEUE)
    if count >= tonumber(MAX_QUEUED) then
      redis.call('DEL', REQUEST)
      return { 'FULL', count }
    end
  end
  redis.call('HSET', STATE, 'status', 'queued', 'digest', given, 'attempt', '0', 'claim', '-1', 'runs', '0')
  if deadline_ms ~= '' then redis.call('HSET', STATE, 'deadline', deadline_ms) end
  if TICKET ~= '' then redis.call('HSET', STATE, 'ticket', TICKET) end
  redis.call('PEXPIRE', STATE, LIVE_MS)
  return { 'NEW', 'queued' }
end

local answers, enqueued = {}, 0
for number = 0, math.floor(#KEYS / KEYS_EACH) - 1 do
  local keys, args = number * KEYS_EACH + 1, number * ARGS_EACH + 7
  turn_to(keys)
  -- Most jobs are new: one question, to all that could know them, takes the place of three.
  local is_new = redis.call('EXISTS', unpack(KEYS, keys, keys + KEYS_EACH - 1)) == 0
  local answer = submit(is_new, keys, ARGV[args], ARGV[args + 1])
  local open = answer[1] == 'NEW' or (answer[1] == 'EXISTS' and not TERMINAL[answer[2]] and answer[2] ~= 'expired')
  if TOGETHER and open and (is_new or not is_queued(KEYS[keys + 3], KEYS[keys + 4], KEYS[keys + 5])) then
    enqueue(KEYS[keys + 3], QUEUE, ARGV[args + 2], ARGV[args + 3], QUEUE_MS, FAIR == '1' and ARGV[args + 4])
    enqueued = enqueued + 1
  end
  answers[number + 1] = answer
end
ring(DOORBELL, math.min(enqueued, tonumber(RINGS)))
return answers
