-- wrk: each connection reports as a device of its own, with a token from the file named by TOKENS (lines: path<TAB>token).
-- Answers other than HTTP 200 with code 0 are counted and printed at the end.
requests = {}
local size = tonumber(os.getenv("PAYLOAD") or "200")
local body = string.rep("x", size)
for line in io.lines(os.getenv("TOKENS")) do
  local path, token = line:match("^(%S+)\t(%S+)$")
  requests[#requests + 1] = wrk.format("POST", path, {
    ["Content-Type"] = "application/octet-stream", ["password"] = token, ["Content-Length"] = tostring(size), ["Host"] = "localhost",
  }, body)
end

dofile(os.getenv("COUNT"))
