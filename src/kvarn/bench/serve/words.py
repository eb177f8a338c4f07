"""Common English words, most of them one token for most tokenizers."""

_LISTED = """
able about above across act add after again age air all almost also always among animal answer any area arm art ask
autumn back ball bank base bear beat bed before begin behind bell best better between big bird black blue boat body
bone book both box boy branch bread break bridge bring brother brown build burn bus buy call came camp car care
carry case catch cause cell center chair chance change check child choose circle city claim class clean clear climb
clock close cloud coast coat cold color come common cook cool copy corn corner cost count country course cover
create cross crowd cry cut dance dark day deal dear decide deep desert design develop die differ dinner direct do
dog door doubt down draw dream dress drink drive drop dry during each early earth east easy eat edge effect egg
eight end energy engine enough enter equal even event ever every exact example eye face fact fair fall family famous
far farm fast father fear feed feel few field fight figure fill final find fine finger finish fire first fish fit
five flat floor flow flower fly follow food foot force forest form forward four free fresh friend front fruit full
game garden gas gather general gentle give glad glass gold gone good govern grand grass gray great green ground
group grow guess guide hair half hand happen happy hard hat head hear heart heat heavy help high hill history hold
hole home hope horse hot hour house huge human hundred hunt hurry ice idea inch iron island job join joy jump keep
key kind king know lady lake land language large last late laugh law lay lead learn leave left leg less letter level
lie life lift light like line list listen little live long look lost lot loud love low machine main major make man
many map mark market mass master match matter mean measure meat meet metal method middle might mile milk mind minute
mix modern moment money month moon morning most mother mountain mouth move much music name nation nature near neck
need never new next night nine noise north nose note nothing notice number object ocean offer office oil old open
order other over own page paint pair paper parent part party pass past path pattern pay people person phrase picture
piece place plain plan plane planet plant play please point poor port position post pound power present press pretty
print problem process produce proper prove public pull push put question quick quiet quite race radio rain raise
range reach read ready real reason record red region repeat reply rest result rich ride ring rise river road rock
roll room root rope round row rule run safe sail salt same sand save say school science sea season seat second
section seed seem sell send sense sentence serve set settle seven shape share sharp sheet shell ship shoe shop shore
short shoulder shout show side sign silent silver simple sing sister sit size skin sky sleep slow small smell smile
snow soft soil soldier solution some song soon sound south space speak special speech speed spell spend spring
square stand star start state station stay steam steel step stick still stone stop store story straight strange
stream street strong student study such sudden sugar suit summer sun supply support sure surface surprise swim
system table tail take talk tall teach team tell ten term test thank thick thin thing think third thought thousand
three through throw tie time tiny together tone tool top total touch toward town track trade train travel tree
triangle trip trouble true try tube turn twenty two type under unit until use usual valley value vary very view
village visit voice vowel wait walk wall want war warm wash watch water wave way wear weather week weight well west
wheel white whole wide wife wild wind window wing winter wire wish woman wonder wood word work world write wrong
yard year yellow young
"""
COMMON = tuple(_LISTED.split())
