-- What both loads share: send `requests` in turn, look at each answer, print a RESULT line at the end.
local threads, at = {}, 0
local wanted, right = os.getenv("WANTED") or '"code":0', tonumber(os.getenv("STATUS") or "200")
bad, good, sample = 0, 0, ""
function setup(thread) threads[#threads + 1] = thread end
function request()
  at = at % #requests + 1
  return requests[at]
end
function response(status, headers, answer)
  if status == right and answer:find(wanted, 1, true) then
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
