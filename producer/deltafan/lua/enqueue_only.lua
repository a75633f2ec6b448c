-- KEYS  arq job, arq in-progress, arq result, queue, doorbell
-- ARGV  id, record, ttl_ms, ring ('1' to wake an idle worker | '0'), fair ('1' | '0'), tenant, max_queued ('' for a
-- job that was known before: it is never refused)
-- Returns {1 enqueued | 0 already queued or running | 'FULL', how many wait}
if ARGV[7] ~= '' and redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then
  local count = waiting(KEYS[4])
  if count >= tonumber(ARGV[7]) then return { 'FULL', count } end
end
if is_queued(KEYS[1], KEYS[2], KEYS[3]) then return { 0, 0 } end
enqueue(KEYS[1], KEYS[4], ARGV[1], ARGV[2], ARGV[3], ARGV[5] == '1' and ARGV[6])
ring(KEYS[5], tonumber(ARGV[4]))
return { 1, 0 }
