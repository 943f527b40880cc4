xpk workload create \
  --cluster pods \
  --workload sd15 \
  --tpu-type v5p-32 \
  --num-slices 1 \
  --docker-image reg.io/me/sdjax:1 \
  --max-restarts 100 \
  --restart-on-exit-codes 1 \
  --termination-grace-period-seconds 120 \
  --command 'SDJAX_COORDINATOR=auto launch/run.sh v5p-32 sdjax train --config configs/sd15.py:res=256 --workdir '"'"'/mnt/bucket/a run'"'"' '"'"'--config.data.caption_column=it'"'"'"'"'"'"'"'"'s $HOME & "IMAGE"'"'"''
