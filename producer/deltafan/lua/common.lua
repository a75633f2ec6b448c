-- Shared by every script that touches a job.  KEYS[1..3]: events, state, result (one slot).
-- Nothing a script writes is rolled back, so each checks everything first and writes afterwards.
local EVENTS, STATE, RESULT, REQUEST, BELL

-- Turn to the job whose keys begin there: what follows is about that one.
local function turn_to(first)
  EVENTS, STATE, RESULT = KEYS[first], KEYS[first + 1], KEYS[first + 2]
  local job = string.sub(EVENTS, 1, -7)
  REQUEST, BELL = job .. 'request', job .. 'bell'
end
turn_to(1)

local TERMINAL = { completed = true, failed = true, cancelled = true }

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Attempts have 13 digits: tostring() would write them as 1.7e+12.
local function digits(number)
  return string.format('%.0f', number)
end

-- attempt, seq and type of the last entry; 0, -1, '' when there is none
local function top()
  local entry = redis.call('XREVRANGE', EVENTS, '+', '-', 'COUNT', 1)[1]
  if not entry then return 0, -1, '' end
  local attempt, seq = string.match(entry[1], '^(%d+)-(%d+)$')
  return tonumber(attempt), tonumber(seq), entry[2][2]
end

-- How the job ended, or nil. The stream's last entry and the result count too: the state may have been evicted.
local function ended(status)
  if TERMINAL[status or ''] then return status end
  local _, _, kind = top()
  if TERMINAL[kind] then return kind end
  if not status and redis.call('EXISTS', RESULT) == 1 then return 'expired' end
  return nil
end

-- The next attempt's number: above every one ever issued for the job, even when keys or a failover's tail were
-- lost, because it is not below the clock.
local function next_attempt(known)
  local last = top()
  return math.max(known + 1, last + 1, now_ms())
end

local function keep(ms)
  redis.call('PEXPIRE', STATE, ms)
  redis.call('PEXPIRE', EVENTS, ms)
end

-- Also the write without which a WAIT on this connection would wait for nothing.
local function keep_ended(ttls)
  redis.call('PEXPIRE', EVENTS, ttls[1])
  redis.call('PEXPIRE', RESULT, ttls[2])
  redis.call('PEXPIRE', STATE, ttls[3])
end

-- A write that changes nothing, for answers that would make none: or a WAIT behind them would wait for nothing.
local function touch()
  local left = redis.call('PTTL', STATE)
  if left > 0 then redis.call('PEXPIRE', STATE, left) end
end

-- Usage notes of all model calls of the job: {call, record, call, record, …}
local function notes()
  local fields, out = redis.call('HGETALL', STATE), {}
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'u:' then
      out[#out + 1] = string.sub(fields[i], 3)
      out[#out + 1] = fields[i + 1]
    end
  end
  return out
end

-- End the job in nobody's attempt: under a new one, so that no entry of a running worker can follow.
local function close(status, payload, result, known, ttls)
  local attempt = digits(next_attempt(known))
  result.v, result.status, result.content, result.position = 1, status, '', attempt .. '-0'
  redis.call('XADD', EVENTS, attempt .. '-0', 'type', status, 'data', cjson.encode(payload))
  redis.call('HSET', STATE, 'status', status, 'attempt', attempt, 'run', '', 'ended', digits(now_ms()))
  redis.call('SET', RESULT, cjson.encode(result), 'NX')
  keep_ended(ttls)
  redis.call('PUBLISH', BELL, status)
end

local function close_cancelled(reason, known, ttls)
  close('cancelled', { reason = reason }, { cancel_reason = reason }, known, ttls)
end

local function close_failed(code, message, known, ttls)
  local failure = { code = code, message = message, retryable = false }
  close('failed', failure, { failure = failure }, known, ttls)
end
