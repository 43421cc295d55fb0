-- wrk: each connection reports as a device of its own, with a token from the file named by TOKENS (lines: path<TAB>token).
-- Answers other than HTTP 200 with code 0 are counted and printed at the end.
local requests, size = {}, tonumber(os.getenv("PAYLOAD") or "200")
local body = string.rep("x", size)
for line in io.lines(os.getenv("TOKENS")) do
  local path, token = line:match("^(%S+)\t(%S+)$")
  requests[#requests + 1] = wrk.format("POST", path, {
    ["Content-Type"] = "application/octet-stream", ["password"] = token, ["Content-Length"] = tostring(size), ["Host"] = "localhost",
  }, body)
end

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
