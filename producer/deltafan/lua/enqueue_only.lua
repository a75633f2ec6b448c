-- KEYS  arq job, arq in-progress, arq result, queue, doorbell
-- ARGV  id, record, ttl_ms, ring, max_queued ('' for a job that was known before: it is never refused)
-- Returns {1 enqueued | 0 already queued or running | 'FULL', how many wait}
if ARGV[5] ~= '' and redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then
  local count = waiting(KEYS[4])
  if count >= tonumber(ARGV[5]) then return { 'FULL', count } end
end
return { enqueue(KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1], ARGV[2], ARGV[3], ARGV[4]), 0 }
