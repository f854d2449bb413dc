import { useId, useState, type ReactNode } from "react"
import { Confirm, Dialog } from "./Dialog"
import { storage, usual } from "./storage"
import { text } from "./text"
import type { Settings } from "./types"
import type { Chat } from "./useChat"

type NumberName = "temperature" | "top_k" | "top_p" | "repetition_penalty" | "max_tokens"
const RANGES: Record<NumberName, [number, number, number]> = { // least, most, step
  temperature: [0, 2, 0.1], top_k: [0, 1000, 1], top_p: [0.05, 1, 0.05], repetition_penalty: [0.5, 2, 0.05],
  max_tokens: [1, 4096, 1],
}

export function SettingsDialog({ chat, close }: { chat: Chat, close: () => void }) {
  const { settings, setSettings } = chat
  const [address, setAddress] = useState(settings.address)
  const [key, setKey] = useState(settings.key)
  const [removing, setRemoving] = useState(false)
  const [said, setSaid] = useState("")
  const set = (fields: Partial<Settings>) => setSettings(old => ({ ...old, ...fields }))
  const talks = Object.keys(chat.talks)

  const leave = () => { // an address is used once it is whole
    if (address !== settings.address || key !== settings.key) set({ address: address.trim(), key: key.trim() })
    close()
  }

  return (
    <Dialog title={text.settings} close={leave}>
      <form className="settings" onSubmit={event => { event.preventDefault(); leave() }}>
        <fieldset>
          <legend>{text.where}</legend>
          {(["auto", "server", "browser"] as const).map(kind => (
            <label key={kind} className="choice">
              <input type="radio" name="engine" checked={settings.engine === kind}
                onChange={() => set({ engine: kind })} />
              <span>{text.engines[kind][0]}<span className="help">{text.engines[kind][1]}</span></span>
            </label>))}
          {settings.engine !== "browser" && <>
            <Field label={text.address} help={text.addressHelp}>
              {props => <input {...props} type="url" placeholder="http://127.0.0.1:8000" value={address}
                onChange={event => setAddress(event.target.value)} />}
            </Field>
            <Field label={text.key} help={text.keyHelp}>
              {props => <input {...props} type="password" autoComplete="off" value={key}
                onChange={event => setKey(event.target.value)} />}
            </Field>
          </>}
        </fieldset>
        <fieldset>
          <legend>{text.drawing}</legend>
          {(Object.keys(RANGES) as NumberName[]).map(name => (
            <NumberField key={name} name={name} value={settings[name]} set={value => set({ [name]: value })} />))}
          <Field label={text.seed} help={text.seedHelp}>
            {props => <input {...props} type="number" min={0} step={1} value={settings.seed ?? ""}
              onChange={event => {
                const value = Math.trunc(Number(event.target.value))
                set({ seed: event.target.value === "" || !(value >= 0 && value < 2 ** 53) ? null : value })
              }} />}
          </Field>
        </fieldset>
        <Field label={text.theme}>
          {props => <select {...props} value={settings.theme}
            onChange={event => set({ theme: event.target.value as Settings["theme"] })}>
            {Object.entries(text.themes).map(([value, name]) => <option key={value} value={value}>{name}</option>)}
          </select>}
        </Field>
        <fieldset>
          <legend>{text.kept}</legend>
          <div className="row">
            <button type="button" disabled={!talks.length} onClick={() => setRemoving(true)}>{text.removeAll}</button>
            <button type="button" onClick={() => storage.deleteFiles().then(() => setSaid(text.modelRemoved), () => {})}>
              {text.removeModel}</button>
          </div>
          <p role="status" className="help">{said}</p>
        </fieldset>
        <div className="row end">
          <button type="button" onClick={() => { set({ ...usual, engine: settings.engine, theme: settings.theme,
            address: settings.address, key: settings.key }) }}>{text.reset}</button>
          <button className="primary">{text.close}</button>
        </div>
      </form>
      {removing && <Confirm title={text.removeAll} body={text.removeAllBody(talks.length)} action={text.remove}
        close={() => setRemoving(false)} confirm={() => chat.remove(talks)} />}
    </Dialog>
  )
}

interface FieldProps { id: string, "aria-describedby"?: string }

function Field({ label, help, children }:
    { label: string, help?: string, children: (props: FieldProps) => ReactNode }) {
  const id = useId()
  return (
    <div className="field">
      <label htmlFor={id}>{label}</label>
      {children({ id, "aria-describedby": help && `${id}-help` })}
      {help && <p className="help" id={`${id}-help`}>{help}</p>}
    </div>
  )
}

/** A number that stays within its range: while something else is typed, the last good value counts. */
function NumberField({ name, value, set }: { name: NumberName, value: number, set: (value: number) => void }) {
  const [typed, setTyped] = useState<string | null>(null)
  const [least, most, step] = RANGES[name]
  const good = (shown: string) => shown !== "" && Number(shown) >= least && Number(shown) <= most
    && (step < 1 || Number.isInteger(Number(shown)))
  const bad = typed !== null && !good(typed)
  return (
    <Field label={text[name]} help={`${text[`${name}Help`]} ${text.range(least, most)}`}>
      {props => <input {...props} type="number" min={least} max={most} step={step} aria-invalid={bad}
        value={typed ?? value} onBlur={() => setTyped(null)} onChange={event => {
          setTyped(event.target.value)
          if (good(event.target.value)) set(Number(event.target.value))
        }} />}
    </Field>
  )
}
