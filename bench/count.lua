-- What both loads share: send `requests` in turn, look at each answer, print a RESULT line at the end.
local threads, at = {}, 0
bad, good, sample = 0, 0, ""
function setup(thread) threads[#threads + 1] = thread end
function request()
  at = at % #requests + 1
  return requests[at]
end
function response(status, headers, answer)
  if status == 200 and answer:find('"code":0', 1, true) then
    good = good + 1
  else
    bad = bad + 1
    sample = status .. " " .. answer
  end
end
function done(summary, latency, requests)
  local good, bad, sample = 0, 0, ""
  for _, thread in ipairs(threads) do
    good, bad = good + thread:get("good"), bad + thread:get("bad")
    if thread:get("sample") ~= "" then sample = thread:get("sample") end
  end
  io.write(string.format("RESULT %d %d %d %d %d %d %s\n", good, bad, summary.duration,
    latency:percentile(50), latency:percentile(99),
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout, sample))
end
