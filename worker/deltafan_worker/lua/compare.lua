-- Tells a writer where it stands: on every new connection, after every refused append, when `finish` says CHECK.
-- ARGV  run, attempt, claim, sent (highest seq handed to a socket), live_ms, stream_ttl_ms, result_ttl_ms, state_ttl_ms
-- Returns {'OK', cancel} | {'HEAL', cancel, top seq} the server lost a suffix | {'REPLAY', cancel} history can not be
-- mended in place | {'ENDED', status, notes} | {'FENCED'} a newer attempt or claim owns the job

-- Whether ids right above the top are still to be had. Not after an XDEL of the last entries: their ids are used up.
local function continues_at(top_attempt, top_seq)
  local info = redis.call('XINFO', 'STREAM', EVENTS)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] == digits(top_attempt) .. '-' .. digits(top_seq) end
  end
end

local attempt, claim, sent = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local state = redis.call('HMGET', STATE, 'status', 'run', 'attempt', 'claim', 'base', 'cancel')
local status = ended(state[1])
if status then
  keep_ended({ ARGV[6], ARGV[7], ARGV[8] })
  return { 'ENDED', status, notes() }
end
local cancel = state[6] or ''
if not state[1] then return { 'REPLAY', cancel } end
if state[2] ~= ARGV[1] then
  -- A state older than our own begin means that a failover lost that begin; we still hold the whole run.
  if tonumber(state[3] or 0) < attempt and tonumber(state[4] or -1) <= claim then return { 'REPLAY', cancel } end
  return { 'FENCED' }
end
keep(ARGV[5])
local top_attempt, top_seq = top()
-- With seq without holes the length is known: base entries up to and with `started`, then one per seq.
if top_attempt ~= attempt or redis.call('XLEN', EVENTS) ~= tonumber(state[5]) + top_seq then return { 'REPLAY', cancel } end
if top_seq < sent then
  return continues_at(top_attempt, top_seq) and { 'HEAL', cancel, top_seq } or { 'REPLAY', cancel }
end
return { 'OK', cancel }
