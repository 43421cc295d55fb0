-- wrk: signs in, over and over, with the bodies of the file named by BODIES, one JSON object a line.
local requests, at = {}, 0
for line in io.lines(os.getenv("BODIES")) do
  requests[#requests + 1] = wrk.format("POST", "/auth", {
    ["Content-Type"] = "application/json", ["Content-Length"] = tostring(#line), ["Host"] = "localhost",
    ["Connection"] = os.getenv("CONNECTION") or "keep-alive",
  }, line)
end

local threads = {}
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
