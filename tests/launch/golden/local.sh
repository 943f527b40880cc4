exec launch/run.sh cpu sdjax train --config configs/sd15.py:res=256 --workdir '/mnt/bucket/a run' '--config.data.caption_column=it'"'"'s $HOME & "IMAGE"'
