-- wrk: sends one request over and over, BODY to the path TARGET with the headers of HEADERS (a line each); an answer is right when its
-- status is STATUS and it holds WANTED.
local headers = { ["Host"] = "localhost" }
for name, value in (os.getenv("HEADERS") or ""):gmatch("([^:\n]+): ([^\n]+)") do
  headers[name] = value
end
requests = { wrk.format("POST", os.getenv("TARGET"), headers, os.getenv("BODY")) }

dofile(os.getenv("COUNT"))
