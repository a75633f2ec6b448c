-- What the sweeper needs to know of a job's state; nothing is written.
-- Returns nil when there is none, else {status, now_ms, expiry_ms, ended_ms, deadline_ms, digest ('' where there is
-- none), runs, call, call, …}. Whoever has anything to do with a job renews its lifetime, so an expiry that stands
-- still means that nobody has.
if redis.call('EXISTS', STATE) == 0 then return nil end
local state = redis.call('HMGET', STATE, 'status', 'ended', 'deadline', 'digest', 'runs')
local now, flat = now_ms(), notes()
local out = { ended(state[1]) or state[1] or '', digits(now), digits(now + redis.call('PTTL', STATE)), state[2] or '',
  state[3] or '', state[4] or '', state[5] or '0' }
for i = 1, #flat, 2 do out[#out + 1] = flat[i] end
return out
