-- KEYS  arq job, arq in-progress, arq result, queue, doorbell
-- ARGV  id, record, ttl_ms, ring
return enqueue(KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1], ARGV[2], ARGV[3], ARGV[4])
