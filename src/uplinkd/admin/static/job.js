// How far a job is, twice a second; when it has ended the page is loaded anew, with its result.
const box = document.getElementById("job");
const bar = document.getElementById("progress");
const told = document.getElementById("told");
const number = (value) => value.toLocaleString("en");

async function look() {
  const answer = await fetch(`/api/v1/jobs/${box.dataset.id}`);
  if (!answer.ok) return;
  const job = await answer.json();
  if (job.state !== "running") {
    location.reload();
    return;
  }
  if (job.total) {
    bar.max = job.total;
    bar.value = job.done;
  }
  told.textContent = job.total ? `${number(job.done)} / ${number(job.total)}` : number(job.done);
  setTimeout(look, 500);
}

if (box.dataset.state === "running") setTimeout(look, 200);
