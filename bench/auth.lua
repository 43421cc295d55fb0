-- wrk: signs in, over and over, with the bodies of the file named by BODIES, one JSON object a line.
requests = {}
for line in io.lines(os.getenv("BODIES")) do
  requests[#requests + 1] = wrk.format("POST", "/auth", {
    ["Content-Type"] = "application/json", ["Content-Length"] = tostring(#line), ["Host"] = "localhost",
    ["Connection"] = os.getenv("CONNECTION") or "keep-alive",
  }, line)
end

dofile(os.getenv("COUNT"))
