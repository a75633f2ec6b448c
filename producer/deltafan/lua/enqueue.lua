-- Writes arq's job record and queue entry, and rings.  One definition for both ways to reach it: alone on the
-- queue's server, or behind submit.lua in the same call when both live on one server.
--   keys   job, in-progress, result, queue, doorbell
--   ring   '1' to wake an idle worker; a bulk submit rings for some of its jobs only
--   returns 1 enqueued, 0 already queued or running
-- waiting(queue): how many jobs nobody has claimed; a claimed one's score is the end of its lease.
-- A result that arq still keeps does not stand in the way: the job's own state decides whether it may run.
local function server_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function waiting(queue)
  return redis.call('ZCOUNT', queue, '-inf', server_ms())
end

local function enqueue(job, in_progress, result, queue, doorbell, id, record, ttl_ms, ring)
  if redis.call('EXISTS', job, in_progress, result) > 0 then
    if redis.call('EXISTS', job, in_progress) > 0 then return 0 end
    redis.call('DEL', result)
  end
  redis.call('SET', job, record, 'PX', ttl_ms)
  redis.call('ZADD', queue, server_ms(), id)
  -- Tokens are hints; a few dozen wake any fleet, and idle doorbells disappear.
  if ring == '1' and redis.call('LLEN', doorbell) < 64 then
    redis.call('LPUSH', doorbell, 1)
    redis.call('PEXPIRE', doorbell, 60000)
  end
  return 1
end
